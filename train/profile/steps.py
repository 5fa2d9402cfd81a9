"""Which steps of a start the profiler looks at."""

WARM_UPS = 3


def check_steps(profile_steps: int, *, step: int, last: int) -> None:
    """Refuse, with a ValueError, to profile a run that ends too early; `step` is where it stands.

    As many steps as are taken apart are timed as a whole, in turns with them.
    """
    if profile_steps < 1:
        raise ValueError(f"profile_steps={profile_steps} must be at least 1")
    needed, left = WARM_UPS + 2 * profile_steps, last - step
    if left < needed:
        raise ValueError(
            f"profile=true needs {needed} steps ({WARM_UPS} to warm up and twice profile_steps="
            f"{profile_steps}), but schedule.steps={last} leaves {left}; choose more steps, or a "
            "smaller profile_steps"
        )
