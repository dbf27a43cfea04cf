"""Learn from recorded requests and feedback: measure drift, train on corrections, register a better version."""
