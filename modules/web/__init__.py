"""What stands between the page and its visitors."""
