"""The engine core: schedule, pages, run, commit, in a process of its own that owns the device and knows no text."""
