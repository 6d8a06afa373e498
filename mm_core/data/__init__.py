"""From tar shards to decoded samples: tar → index → ledger → plan → ranged reads → samples. No Ray here."""
