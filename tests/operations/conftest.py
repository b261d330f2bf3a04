"""A worker in this process with tiny models."""

from tests.pipeline.conftest import models, workplace

__all__ = ["models", "workplace"]
