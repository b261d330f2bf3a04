"""What reviewers decide on the samples of an audit."""
