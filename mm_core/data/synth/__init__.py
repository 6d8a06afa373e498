"""An offline corpus: rendered scenes whose every fact is known, as WebDataset shards. Seeded to the byte."""
