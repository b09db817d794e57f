"""The ways to fit a rule: linear smoothers, elastic net, best subset."""
