"""What a pool shares with evaluation sets: by keys of its texts, by their shingles, by vectors."""
