"""`mm data report`: what an index holds and what its ledgers make of it, as one HTML file.

view      the usable rows of a chunk, with every ledger's decisions
tally     pass 1, per chunk: counts, spreads, draws; they add up
histogram the spread of values, the axis it gives, and pass 2's bins
pictures  drawn samples as small pictures and captions
maps      embeddings of drawn samples, in two dimensions
findings  all of it gathered
svg, page charts and the page
write     what the command calls
"""
