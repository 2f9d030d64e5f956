"""Images: where they come from, how they are cut, and how they reach the loop."""
