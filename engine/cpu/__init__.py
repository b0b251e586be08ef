"""What the CPU device needs: memory, and a plan as one native call."""
