"""What runs in Triton's Python stub: the door between Triton and the engine hosts. Imports neither torch nor vllm."""
