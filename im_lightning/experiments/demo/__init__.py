"""The whole loop on a synthetic pool."""
