"""bigkern inside other libraries. Each module needs its own, and is imported by its name."""
