"""Ray Serve applications over bundles: the HTTP interface, dynamic batching, the `mm serve` command."""
