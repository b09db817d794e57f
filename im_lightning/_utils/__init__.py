"""Generic helpers that know nothing of this package's subject: files, hashes, random streams, progress, tables."""
