"""Probes for the frameworks that run MoE models: discovery of routers and reversible patches."""
