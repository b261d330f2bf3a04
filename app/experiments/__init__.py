"""Experiments: sets of audits that compare estimators, layer groups and aggregations."""
