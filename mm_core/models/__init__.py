"""Models and tokenizers. Where transformers has the model, that class is the model; here are its sizes and how it is fed."""
