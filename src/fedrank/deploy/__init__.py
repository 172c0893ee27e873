"""What a deployment on Flower is made of: its keys, the folders of server and sites, its gate, and a site's check."""
