"""Workers: started, watched and ended; and on which hosts they run."""
