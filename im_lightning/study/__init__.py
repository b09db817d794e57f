"""Floor 5: experiments on the method itself: the playground, the demo, honest comparisons."""
