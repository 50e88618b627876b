"""What each process of ``test_time_parallel.py`` does: cases that compare clips split over ranks with whole clips."""
