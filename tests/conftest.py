"""What every test relies on: Hypothesis without a clock, so that a busy machine fails nothing."""

from hypothesis import settings

settings.register_profile("hive", deadline=None, database=None)
settings.load_profile("hive")
