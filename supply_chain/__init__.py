"""What Winnow is built from: advisories, licences, a bill of materials of every pinned package."""
