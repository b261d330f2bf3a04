"""The verbs of the command `winnow`. Only what a verb needs is imported, when it is run."""
