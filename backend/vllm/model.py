from triton_backend.model import TritonPythonModel  # noqa: D100, F401
