"""The trail: who changed what, and when."""
