"""What a step computes, what a run reads, and the loop."""
