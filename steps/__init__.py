"""The steps of the features, by noun; this index is the plugin that pytest loads (`-p steps`)."""

pytest_plugins = [
    "steps.leaks",
    "steps.driver",
    "steps.real",
]
