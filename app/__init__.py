"""The API: talks HTTP and SQL, never imports torch."""
