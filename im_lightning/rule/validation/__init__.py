"""What a fitted rule is worth: held out, against baselines, resampled, and run by run."""
