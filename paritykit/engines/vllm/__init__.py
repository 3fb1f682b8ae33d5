"""vLLM as an engine: real vLLM, hooked in its workers through its public worker extension and RPC."""
