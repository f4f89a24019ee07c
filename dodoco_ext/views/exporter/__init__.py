"""`dodoco metrics`: recordings as metrics for Prometheus; see docs/prometheus.md."""
