"""What Prometheus reads at /metrics: the service by its database, this process by its requests."""
