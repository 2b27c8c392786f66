"""adytum: confidential inference. A confidential backend for language models, and the client that verifies it.

The parts are folders at the top of the repository; the links here make them one import package. CONTRIBUTING.md says
why.
"""
