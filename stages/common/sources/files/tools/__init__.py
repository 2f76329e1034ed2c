"""Tools and calls as the field's formats write them: OpenAI, Hermes, ShareGPT, xLAM."""
