"""The embedded main job: all stages on generated data, evaluated, exported and shown."""
