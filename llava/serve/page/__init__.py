"""The web page: a person drops a photo and reads verdict, reasons and limits; nothing is loaded from elsewhere."""
