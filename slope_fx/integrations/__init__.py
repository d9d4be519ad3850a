"""Integrations: callbacks for the training loops of other libraries, and export to PEFT."""
