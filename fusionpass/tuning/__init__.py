"""What was measured, and what follows from it for the choice of a kernel."""
