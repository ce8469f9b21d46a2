"""The simulated engine and its physics: a vLLM server without a GPU, for the demo and for tests."""
