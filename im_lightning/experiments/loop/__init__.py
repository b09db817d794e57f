"""The whole loop on a user's own data: scores, designed runs, rule, and whether it paid."""
