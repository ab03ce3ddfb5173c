"""Support kernel backends: tables of configurations, recorded launches, host memory."""
