"""The training set as it was sent, with what was decided on its samples."""
