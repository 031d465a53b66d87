"""The templates of the model card (``model_card.md``) and the dataset card."""
