"""The calls of the API, each written once, as coroutines over a connection."""
