"""What runs on the GPU machines: Celery tasks, the stages of an audit, the influence engine."""
