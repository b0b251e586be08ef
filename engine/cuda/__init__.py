"""What a GPU needs: memory, kernels and how each op launches them."""
