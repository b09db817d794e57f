"""How much each row weighs."""
