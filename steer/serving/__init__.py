"""An OpenAI-compatible server in front of a steered model: `steer serve`, or `create_app` in an application of yours.

Nothing here is imported by `import steer`; the web framework is an extra, `pip install steer-engine[serve]`.
"""
