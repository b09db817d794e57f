"""How example loss correlates with the indicators while a model trains."""
