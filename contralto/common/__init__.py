"""Code that all parts of contralto share: files, models as users name them, messages, pages."""
