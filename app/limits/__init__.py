"""How much a tenant or a key may use: requests, audits, datasets, time of workers."""
